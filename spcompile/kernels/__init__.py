"""Local computation: what one device does with the tensors it holds. Nothing here knows of ranks."""
