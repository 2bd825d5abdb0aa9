"""Files: finding, describing, reading and repacking them."""
