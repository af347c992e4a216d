"""What is learned from: text to tokens, the files that keep them, and the order in which a run takes them."""
