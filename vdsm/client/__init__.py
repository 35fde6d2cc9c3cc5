"""The agent's blocking client and `vdsm-client`, on the standard library alone.

Start-up is what a command-line client is felt by, so nothing here imports asyncio, typing, argparse, ssl or http.client
unless a call needs it. Lowest first: `failures`, `stream`, `tls`, `channels`, `transport`; then the command: `exits`,
`output`, `arguments`, `schema`, `nearby`, `offered`, `reference`, `catalogue`, `completion`, `waiting`, `cli`.
"""
