"""How a ticket is found: parts that compose, none of which knows how a network is trained."""
