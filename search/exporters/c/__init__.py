"""A packed model as a C99 library without dependencies."""
