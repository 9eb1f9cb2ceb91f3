"""One module per sub-command of `sdan-fast`."""
