"""Software-engineering environments: a repository in a sandbox, tools, hidden tests."""
