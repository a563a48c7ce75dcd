"""YAML of the commands about a folder of data: beside the group `data` of `flowdit.configs`, `data=<folder>` would be its option."""
