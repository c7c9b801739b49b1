"""The command line ``ascend-plugin``. Nothing heavy is imported before a command runs."""
