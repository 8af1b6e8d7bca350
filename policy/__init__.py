"""What answers: engines, renderers and scripts behind one interface. Importing this package imports no torch."""
