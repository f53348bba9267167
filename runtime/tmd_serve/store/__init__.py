"""Jobs and API keys in a database: SQLite for one machine, PostgreSQL for several."""
