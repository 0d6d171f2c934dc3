"""The other side of `synthesis.sandbox`: programs that run in processes of their own, on the standard library alone."""
