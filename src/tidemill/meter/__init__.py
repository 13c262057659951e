"""The meter: holds, write-ahead usage log, settlement, recovery. One record per accepted request."""
