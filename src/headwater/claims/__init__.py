"""Claims: one experiment per method, under the method's file name."""
