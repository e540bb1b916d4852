"""Which model this is: its parts, family, wrappers and fingerprint, how it is loaded and prompted."""
