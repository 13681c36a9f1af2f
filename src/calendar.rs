//! Dates: UTC in answers and reports; the local time in chat templates, in the formats of Python's `strftime`.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use std::time::{SystemTime, UNIX_EPOCH};

/// The current time in UTC, as `2026-11-22T20:44:31Z`.
pub fn now() -> String {
    written(SystemTime::now())
}

/// A time in UTC, as `2026-11-22T20:44:31Z`.
pub fn written(time: SystemTime) -> String {
    since_1970(time).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A time in UTC with milliseconds, as `2026-02-03T04:05:06.789Z`.
pub fn timestamp(time: SystemTime) -> String {
    since_1970(time).strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// The date in UTC, as `2026-02-03`.
pub fn date(time: SystemTime) -> String {
    since_1970(time).strftime("%F").to_string()
}

/// Seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Date and time of day in the time zone of the environment variable `TZ`, else in the system's.
pub(crate) fn local(time: SystemTime) -> DateTime {
    since_1970(time).to_zoned_datetime(TimeZone::system()).datetime()
}

/// The time; 1970 if it lies beyond the calendar.
fn since_1970(time: SystemTime) -> Timestamp {
    Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// What a specifier, the letter after a `%`, stands for.
enum DatePart {
    /// A number, the least number of its digits, and the character that fills them up.
    Number(i64, usize, char),
    Text(String),
    /// Another format.
    Format(&'static str),
    /// Six digits, which no flag changes.
    Microseconds,
}

/// The flags between `%` and a letter.
#[derive(Default)]
struct Flags {
    /// `_`, `-` or `0`.
    fill_with: Option<char>,
    uppercase: bool,
    /// `#`: upper case becomes lower case, or the other way round.
    swap: bool,
    width: usize,
}

/// The time as Python's `datetime.strftime` writes one without a time zone, on Linux and in English (glibc's
/// `strftime_l.c`): the flags `_`, `-`, `0`, `^` and `#` and a width have an effect, `%z` and `%Z` are empty, and an unknown
/// specifier stays as it is. jiff gives the values of single specifiers. Its own formats refuse unknown specifiers, and
/// know other widths and flags.
pub(crate) fn strftime(time: DateTime, format: &str) -> String {
    let mut text = String::new();
    let mut unread = format;
    while let Some(percent) = unread.find('%') {
        text.push_str(&unread[..percent]);
        let (flags, letter, length) = flags(&unread[percent + 1..]);
        let end = percent + 1 + length;
        match letter.and_then(|letter| Some((letter, part(time, letter)?))) {
            Some((letter, part)) => text.push_str(&flags.write(time, letter, &part)),
            None => text.push_str(&flags.fill(unread[percent..end].to_owned())),
        }
        unread = &unread[end..];
    }
    text + unread
}

/// The flags after a `%`, the letter after them, and the number of bytes of both.
fn flags(text: &str) -> (Flags, Option<char>, usize) {
    let mut flags = Flags::default();
    let mut letters = text.char_indices().peekable();
    while let Some((_, flag)) = letters.next_if(|(_, letter)| "_-0^#".contains(*letter)) {
        match flag {
            '^' => flags.uppercase = true,
            '#' => flags.swap = true,
            fill => flags.fill_with = Some(fill),
        }
    }
    while let Some((_, digit)) = letters.next_if(|(_, letter)| letter.is_ascii_digit()) {
        let width = flags.width * 10 + digit as usize - '0' as usize;
        flags.width = width.min(MAX_WIDTH);
    }
    // `E` and `O` ask for other forms of dates and digits, which English does not have. They may precede some letters only.
    let modified = match letters.next_if(|(_, letter)| matches!(letter, 'E' | 'O')) {
        None => None,
        Some((_, 'E')) => Some("%CPRTXYZcnprtuxyz"),
        Some(_) => Some("%BCGHIMPRSTUVWZbdeghjklmnprstuwyz"),
    };
    match letters.next() {
        Some((index, letter)) => {
            let known = modified.is_none_or(|allowed| allowed.contains(letter));
            (flags, Some(letter).filter(|_| known), index + letter.len_utf8())
        }
        None => (flags, None, text.len()),
    }
}

/// The largest width.
const MAX_WIDTH: usize = 255;

impl Flags {
    fn write(&self, time: DateTime, letter: char, part: &DatePart) -> String {
        let mut text = match part {
            DatePart::Microseconds => return format!("{:06}", time.subsec_nanosecond() / 1000),
            DatePart::Number(number, digits, fill) => {
                let number = number.to_string();
                return match self.fill_with.unwrap_or(*fill) {
                    '-' => number,
                    fill => filled(number, *digits.max(&self.width), if fill == '_' { ' ' } else { fill }),
                };
            }
            DatePart::Text(text) => text.clone(),
            DatePart::Format(format) => strftime(time, format),
        };
        if self.swap && letter == 'p' {
            text = text.to_lowercase();
        } else if (self.uppercase && letter != 'P')
            || (self.swap && matches!(letter, 'a' | 'A' | 'b' | 'B' | 'h'))
        {
            text = text.to_uppercase();
        }
        self.fill(text)
    }

    fn fill(&self, text: String) -> String {
        filled(text, self.width, if self.fill_with == Some('0') { '0' } else { ' ' })
    }
}

fn filled(text: String, width: usize, fill: char) -> String {
    let missing = width.saturating_sub(text.chars().count());
    std::iter::repeat_n(fill, missing).chain(text.chars()).collect()
}

fn part(time: DateTime, letter: char) -> Option<DatePart> {
    let unpadded = |letter: char| strtime::format(format!("%-{letter}"), time).ok();
    let number =
        |digits: usize, fill: char| Some(DatePart::Number(unpadded(letter)?.parse().ok()?, digits, fill));
    let two_digits = |number: i64| Some(DatePart::Number(number, 2, '0'));
    match letter {
        'Y' | 'G' => number(4, '0'),
        'm' | 'd' | 'H' | 'I' | 'M' | 'S' | 'U' | 'W' | 'V' => number(2, '0'),
        'e' | 'k' | 'l' => number(2, ' '),
        'j' => number(3, '0'),
        'u' | 'w' => number(1, '0'),
        // jiff has these for a part of the years alone.
        'C' => two_digits(i64::from(time.year()) / 100),
        'y' => two_digits(i64::from(time.year()) % 100),
        'g' => two_digits(i64::from(time.date().iso_week_date().year()) % 100),
        'f' => Some(DatePart::Microseconds),
        's' => Some(DatePart::Number(local_seconds(time), 1, '0')),
        'B' | 'b' | 'h' | 'A' | 'a' | 'p' | 'P' => unpadded(letter).map(DatePart::Text),
        'z' | 'Z' => Some(DatePart::Text(String::new())),
        'n' => Some(DatePart::Text("\n".into())),
        't' => Some(DatePart::Text("\t".into())),
        '%' => Some(DatePart::Text("%".into())),
        'c' => Some(DatePart::Format("%a %b %e %H:%M:%S %Y")),
        'D' | 'x' => Some(DatePart::Format("%m/%d/%y")),
        'F' => Some(DatePart::Format("%Y-%m-%d")),
        'R' => Some(DatePart::Format("%H:%M")),
        'r' => Some(DatePart::Format("%I:%M:%S %p")),
        'T' | 'X' => Some(DatePart::Format("%H:%M:%S")),
        _ => None,
    }
}

/// Seconds since 1970 of a time in this machine's zone.
fn local_seconds(time: DateTime) -> i64 {
    TimeZone::system().to_zoned_datetime(time).map_or(0, |zoned| zoned.timestamp().as_second())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // Of `date -u -d @SECONDS +%FT%TZ`.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (1_795_380_271, "2026-11-22T20:44:31Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(written(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        cases: Vec<(String, String, String)>,
    }

    #[test]
    fn dates_are_pythons() {
        let golden: Golden = serde_json::from_str(include_str!("../tests/golden/strftime.json")).unwrap();
        assert_eq!(golden.cases.len(), 632);
        let mut wrong = Vec::new();
        for (time, format, expected) in golden.cases {
            let written = strftime(time.parse().unwrap(), &format);
            if written != expected {
                wrong.push(format!("{time} {format:?}: {written:?}, expected {expected:?}"));
            }
        }
        assert!(wrong.is_empty(), "{} dates\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn timestamps_are_utc() {
        let at = |millis| UNIX_EPOCH + Duration::from_millis(millis);
        assert_eq!(timestamp(at(1020)), "1970-01-01T00:00:01.020Z");
        assert_eq!(timestamp(at(951_782_400_000)), "2000-02-29T00:00:00.000Z");
        assert_eq!(date(at(1_735_689_599_000)), "2024-12-31");
    }

    /// Prints the local time; the test below runs it in other time zones.
    #[test]
    #[ignore = "run by local_time_follows_tz"]
    fn print_local_time() {
        println!("local {}", strftime(local(SystemTime::now()), "%Y-%m-%d %H:%M %s"));
    }

    #[test]
    fn local_time_follows_tz() {
        // As POSIX has it, west is positive.
        for (zone, hours) in [("UTC0", 0), ("EAST-14", 14), ("WEST11", -11), ("HALF-5:30", 5)] {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "calendar::tests::print_local_time", "--ignored", "--nocapture"])
                .env("TZ", zone)
                .output()
                .unwrap();
            let output = String::from_utf8(output.stdout).unwrap();
            let (_, line) = output.split_once("local ").expect(&output);
            let (shown, seconds) = line.lines().next().unwrap().rsplit_once(' ').unwrap();
            let minutes = if zone.ends_with(":30") { 30 } else { 0 };
            let shifted = seconds.parse::<i64>().unwrap() + hours * 3600 + minutes * 60;
            let expected =
                Timestamp::from_second(shifted).unwrap().to_zoned_datetime(TimeZone::UTC).datetime();
            assert_eq!(shown, strftime(expected, "%Y-%m-%d %H:%M"), "{zone}");
            let now = seconds_of(SystemTime::now());
            assert!((now - seconds.parse::<i64>().unwrap()).abs() < 600, "{zone}: {seconds}, now {now}");
        }
    }

    fn seconds_of(time: SystemTime) -> i64 {
        seconds(time) as i64
    }
}
