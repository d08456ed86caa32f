"""Basic linear attention (A_t = 1) in time and memory linear in the sequence length."""
