"""The configuration: one TOML file, decoded into frozen structs."""
