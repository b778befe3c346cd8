use std::time::Duration;

/// How to answer badly. Offsets count from the first byte of the body that would have been sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Closes the connection after so many bytes of the body.
    Truncate(u64),
    /// Falls silent after so many bytes, until the client has gone.
    Stall(u64),
    /// Says nothing at all, until the client has gone.
    Silence,
    /// Sends the body a byte at a time, with this pause in between.
    Trickle(Duration),
    /// Announces a length that is off by so much, and closes after the body.
    WrongLength(i64),
    /// Answers with a status.
    Status(u16),
    /// Answers 429 with a `Retry-After`.
    TooMany(String),
    /// A page of text with status 200.
    ErrorPage,
    /// A page of text with status 200 and the length that was expected.
    ErrorPageOfLength,
    /// Changes one byte.
    Corrupt(u64),
    /// Redirects to itself.
    RedirectLoop,
    /// Redirects on and on.
    RedirectChain,
    /// Answers a range with the whole file.
    IgnoreRange,
    /// Answers a range with another one, and says so.
    OtherRange,
    /// Answers a range with the bytes of another one under the right name.
    LyingRange,
    /// Says that the file has another length.
    WrongTotal,
    /// Ends the body by closing the connection instead of a length.
    NoLength,
    /// Says that the body is packed.
    Packed,
    /// Closes the connection before a byte of the answer.
    Close,
    /// Points `main` at another commit, then answers rightly.
    MoveMain(String),
    /// Answers 429 as the Hub does, with this `RateLimit`.
    RateLimit(String),
    /// Names this as the next page.
    NextPage(String),
}
