"""The meter: holds, the write-ahead usage log, settlement and recovery.

Each accepted request leaves one record.
"""
