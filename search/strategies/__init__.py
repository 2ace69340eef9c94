"""Search methods, one file each; `search.strategies.table` lists them."""
