"""What writes text: one protocol, and behind it teachers on the network."""
