"""fedlth audit: what the tickets of a finished run disclose about the clients that hold them."""
