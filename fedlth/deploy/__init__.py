"""Real devices: the folder that a federation needs (keys, certificates, scripts), its check, and the gate."""
