"""Step 2: personal tickets and what they are compared with."""
