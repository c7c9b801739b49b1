"""``python -m ascend_plugin.cli``: the command line without the installed script."""

from ascend_plugin.cli.main import main

if __name__ == "__main__":
    main()
