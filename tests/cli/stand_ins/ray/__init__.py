"""What the documentation's script uses of Ray."""
