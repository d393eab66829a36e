"""Recording training scripts of the user's own, and bringing two recordings into one layout."""
