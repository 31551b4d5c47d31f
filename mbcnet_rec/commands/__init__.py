"""The subcommands of `mbcnet`: options.toml declares their arguments; a function each imports what it runs only when it runs."""
