"""Running untrusted queries in a sandboxed process, and comparing the rows that they return."""
