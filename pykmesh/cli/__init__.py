"""The command line, `pykmesh`."""
