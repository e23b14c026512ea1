"""What a run is: the keys people write, what they may not mean together, and how they are read."""
