"""The subcommands of `mbcnet`: each file adds its arguments with `register` and imports what it runs only when it runs."""
