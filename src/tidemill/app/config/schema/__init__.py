"""The configuration as frozen structs: keys, types and defaults.

What fits together is checked in `validation`.
"""
