"""What code alone says of masks and decays, by symbolic evaluation."""
