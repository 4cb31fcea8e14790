"""The mathematics that the parts share; each function carries a name from a paper."""
