"""Built-in tasks, and the loader of users' own."""
