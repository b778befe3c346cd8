//! Faults that the server can inject into a response.

use std::time::Duration;

/// A fault in a response. Offsets are in bytes from the first byte of the correct body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Closes the connection after this number of bytes of the body.
    Truncate(u64),
    /// Stops sending after this number of bytes of the body, until the client disconnects.
    Stall(u64),
    /// Sends nothing until the client disconnects.
    Silence,
    /// Sends the body one byte at a time with this pause.
    Trickle(Duration),
    /// Announces a length that differs by this number of bytes, and closes the connection after the body.
    WrongLength(i64),
    /// Sends an error with this status.
    Status(u16),
    /// Sends status 429 with this `Retry-After` header.
    TooMany(String),
    /// Sends an HTML page with status 200.
    ErrorPage,
    /// Sends an HTML page with status 200 and the expected length.
    ErrorPageOfLength,
    /// Changes the byte at this offset, modulo the length.
    Corrupt(u64),
    /// Redirects to the requested URL.
    RedirectLoop,
    /// Redirects to a new URL each time, without end.
    RedirectChain,
    /// Sends the whole file instead of the requested range.
    IgnoreRange,
    /// Sends another range, with the correct `Content-Range` of that range.
    OtherRange,
    /// Sends another range with the `Content-Range` of the requested one.
    LyingRange,
    /// Gives a wrong file length in `Content-Range`.
    WrongTotal,
    /// Sends no `Content-Length` and closes the connection after the body.
    NoLength,
    /// Claims that the body is compressed with gzip.
    Packed,
    /// Closes the connection without a response.
    Close,
    /// Points `main` to this commit, then sends the correct response.
    MoveMain(String),
    /// Sends status 429 with this `RateLimit` header, as the Hub does.
    RateLimit(String),
    /// Sends this URL as the next page of a listing.
    NextPage(String),
}
