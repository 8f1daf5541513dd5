"""A saved ticket, written for other tools: compared with it on the client's test part, measured, then kept."""
