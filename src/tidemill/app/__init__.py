"""The composition root: reads the configuration, opens the store, starts and stops the parts."""
