"""What train.py, the loop, is made of."""
