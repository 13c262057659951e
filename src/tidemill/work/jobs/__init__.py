"""Jobs and reservations: commands on whole devices, scheduled, billed by the device-second, recovered."""
