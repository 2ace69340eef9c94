"""Where candidates are evaluated: in this process, or on Ray workers."""
