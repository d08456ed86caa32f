"""The demo: a hybrid model trained on two ranks beside unsharded eager; `python -m demo`."""
