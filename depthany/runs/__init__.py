"""One run from a checked config to its page: what the verbs do, built from every other room."""
