"""What is done to a mixer's value vectors across layers."""
