"""Everything a person touches: the command line, validation, planning, the Python API."""
