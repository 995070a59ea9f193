"""For development and tests: real servers from wheels, and everything in one terminal.

command.py   `coord dev`
embedded.py  a PostgreSQL and a Valkey of one's own
server.py    what both servers share
process.py   child processes that never outlive this one
"""
