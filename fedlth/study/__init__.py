"""The YAML study: schema, parts, catalogue."""
