"""The YAML study: strict YAML, schema, parts."""
