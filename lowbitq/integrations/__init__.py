"""Models of lowbitq in other programs; each module needs a package that lowbitq does not."""
