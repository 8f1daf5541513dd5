"""A run: session, rounds, downloads, client step, and the door that checks replies."""
