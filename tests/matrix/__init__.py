"""The suite on other versions of what coord stands on, other servers, and behind a connection pooler."""
