"""What a run leaves on disk: folder, states, ledger rows, ticket files."""
